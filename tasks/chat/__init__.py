"""Chat templates: bound to the settings of a Spec, probed, and rendered to tokens; and the
tokenizers that have them.

Imports only data and the files of `tasks` itself.
"""
