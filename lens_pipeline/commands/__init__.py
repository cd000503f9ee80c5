"""What `lens-pipeline` does, a file a command or two; `cli` reads what is typed."""
