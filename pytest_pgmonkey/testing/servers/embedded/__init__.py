"""A private server from binaries of this machine, ended by a guardian outside of pytest."""
