"""How users write gangs: each dialect is one API group's words for what `state` knows as a group and its members."""
