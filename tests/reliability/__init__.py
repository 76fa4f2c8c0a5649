"""README's figures of what the gateway has survived: `python -m tests.reliability --help`."""
