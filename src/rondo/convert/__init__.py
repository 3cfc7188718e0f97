"""Conversion: a pretrained directory becomes a recurrent one, proved against its parent."""
