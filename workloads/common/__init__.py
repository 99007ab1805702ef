"""What model families share: the tape that writes operator lists, common pieces of networks, losses, presets and options."""
