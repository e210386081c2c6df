"""`python tools/convert_weights SRC DST --to LAYOUT` is `acejax convert`."""

import sys

from acejax.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
