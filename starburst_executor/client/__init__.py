"""The client's side: submit, watch, settle futures."""
