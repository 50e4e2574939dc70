"""What is done to whole databases, by SQL alone: schemas, templates, locks; imports no servers."""
