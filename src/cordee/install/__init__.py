"""How this program lives on a machine: its folder, its service, its updates, and its end."""
