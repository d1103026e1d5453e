"""The one training machine: source -> objective -> backward -> step -> record."""
