"""Mail that is written by sync code and sent by an async worker."""
