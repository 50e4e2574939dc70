"""The test side: servers, the rolled-back transaction, fixtures. Production never imports it."""
