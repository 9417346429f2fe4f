"""How nodes meet: addresses, identities, enrolment, and the bus for heartbeats and small messages."""
