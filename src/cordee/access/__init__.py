"""Who of the house may ask: keys and their bounds, what each used, and how other machines reach the API."""
