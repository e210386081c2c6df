"""One module a figure: `main(argv)` measures it, prints it and writes it as JSON. Run through `acejax bench NAME`."""
