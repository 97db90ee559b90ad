import sys, os, nbformat
from nbclient import NotebookClient
name=sys.argv[1]; nb=nbformat.read(f"tutorials/{name}.ipynb",4)
for c in nb.cells:
    if c.cell_type=="code": c.outputs=[]; c.execution_count=None
NotebookClient(nb,timeout=1800,coalesce_streams=True,kernel_name="python3",resources={"metadata":{"path":"tutorials"}}).execute()
for c in nb.cells:
    if c.cell_type=="code": c.outputs=[o for o in c.outputs if o.get("name")!="stderr"]
for c in nb.cells: c.metadata.pop("execution",None)
nbformat.write(nb,f"tutorials/{name}.ipynb")
