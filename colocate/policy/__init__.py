"""The ColocationPolicy: its schema (pure), and how a file becomes one."""
