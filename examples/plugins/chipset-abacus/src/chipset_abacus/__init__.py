"""A backend that counts on beads: what a plugin for chipset looks like."""
