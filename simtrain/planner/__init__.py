"""Search over strategies, and the reasons behind the winner."""
