"""One module a verb of the command line, each with a `main(argv)`."""
