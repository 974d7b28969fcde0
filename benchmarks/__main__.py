"`python -m benchmarks NAME`"
from benchmarks import main

raise SystemExit(main())
