"""Chat: turns of a conversation, and how model families write them. Pure."""
