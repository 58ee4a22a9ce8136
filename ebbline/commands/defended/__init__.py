"""`ebbline defend`: apply a defence to adapters, list the defences, print what was done."""
