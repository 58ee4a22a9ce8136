"""The formats that people have rows in, recognised by the columns or by the folder: training rows,
items with choices, and folders of the hub.
"""
