"""The e-mail handlers of the mission, as an application of pmqd."""
