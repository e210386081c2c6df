"""Programs compiled ahead of time for TPUs that are not here, and what their compiler says of them.

libtpu (`pip install 'acejax[aot]'`, Python 3.12 or newer) compiles for a named slice on any machine. Nothing runs: all
figures are the compiler's own.
"""
