"""Lightning callbacks: one a file. They import ``flexidit``, never one another's packages."""
