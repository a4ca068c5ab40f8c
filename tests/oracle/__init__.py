"""An independent slow implementation of activation patching, and small models of many families."""
