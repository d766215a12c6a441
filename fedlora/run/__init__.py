"""One federated run in its folder: who is asked, what is accepted, how a round is played and closed."""
