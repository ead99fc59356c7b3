"""Language models: sources of draws, answers, voting, stopping, and the session that ties them together."""
