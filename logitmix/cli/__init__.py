"""The command line: one module for each verb, with `main(argv)`, which parses, and `run(options)`, which works.

Where the flags do not need them, libraries that take seconds to import are imported in `run`: `--help` stays quick.
"""
