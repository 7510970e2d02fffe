"""`python -m patchscope_nn` is the command `patchscope`."""

from patchscope_nn.cli import main

main()
