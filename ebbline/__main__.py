"""`python -m ebbline`; also the script for `ray submit`, which copies one file to the head and runs
it there.
"""

from ebbline.cli import main

main()
