"""A folder for PYTHONPATH (launch/children.py): what the Python of a user's loop runs before the loop."""
