"""Diffusion processes and their losses.

**Time runs from t = 0, data, to t = T, noise**, everywhere in this project. Discrete processes follow DiT: a step index
``t`` in ``0 .. num_timesteps - 1`` names the latents after ``t + 1`` noising steps, so index 0 is the least noisy level
and a denoising step at index ``t`` leads to index ``t - 1``; the step at index 0 leads to data. A respaced process
counts its own steps from 0; ``model_timesteps`` gives the time that the model was trained with.

A flow has the same indices. There, ``model_timesteps`` are 1000 times the share of noise, so that models see times of
the same range: above 0, data, up to 1000, noise.

:class:`~flexidit.diffusion.process.Process` is what both kinds have in common, and ``process_of`` the kind of a model.

Everything here takes the denoiser as a callable or takes its output as a tensor; nothing imports ``flexidit.models``.
"""
