"""The command `legato`. A subcommand loads what it runs when it runs: `legato --help` needs no gRPC and no torch."""
