"""The store of everything an agent did: journal, projection, episodes, rewards and the registry of versions."""
