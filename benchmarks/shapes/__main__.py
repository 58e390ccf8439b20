"""`python -m benchmarks.shapes`."""

from benchmarks.shapes import main

main()
