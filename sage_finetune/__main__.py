"The program, as `python -m sage_finetune`"
import sys

from sage_finetune.cli import main

if __name__ == "__main__": sys.exit(main())
