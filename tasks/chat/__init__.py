"""Chat templates: bound to the settings of a Spec, probed, and rendered to tokens. The tokenizers
that have them, and the marks of thoughts.

Imports only data and the files of `tasks` itself.
"""
