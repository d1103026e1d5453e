"""What runs on the other side of the border. Standard library only; sent as text, so no file of ours need be readable.

Modules of this folder may import each other, in the order of `sent.py`, and nothing else of luthier.
"""
