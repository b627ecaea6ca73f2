"""A cluster as processes of this machine: what `legato up` and `legato demo` run."""
