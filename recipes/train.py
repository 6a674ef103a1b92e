"""Trains one stage: python recipes/train.py recipes/speak.yaml [key=value ...]"""

import sys

from vocalnet.training.engine import main

if __name__ == "__main__":
    sys.exit(main())
