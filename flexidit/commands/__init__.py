"""What the ``flexidit`` command can do, one module a command, each imported only when it is asked for.

A command module has ``HELP``, ``EXAMPLE``, ``configure(parser)`` and ``run(args) -> int``. It reports bad input by
raising ``ValueError`` or ``OSError`` with one sentence, which ``flexidit.cli`` prints.
"""
