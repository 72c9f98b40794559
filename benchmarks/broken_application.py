"""An application that cannot be imported, for broken reloads."""

raise RuntimeError("this application is broken on purpose")
