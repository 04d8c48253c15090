"""Other people's training loops: each file imports its library when it is used."""
