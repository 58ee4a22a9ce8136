"""Where exceptions become messages: what the terminal shows for each, and the system's own errors
in plain words.
"""
