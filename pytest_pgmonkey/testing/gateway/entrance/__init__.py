"""Where clients come in: a process that accepts them, and what receives them."""
