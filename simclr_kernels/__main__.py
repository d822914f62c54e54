import sys

from simclr_kernels.cli import main

sys.exit(main())
