"""A file for each command. Commands that need torch import torch when the command runs."""
