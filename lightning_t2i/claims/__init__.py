"""What the claims of the papers are judged by."""
