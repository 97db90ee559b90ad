import nbformat,glob
for f in sorted(glob.glob("tutorials/*.ipynb")):
    nb=nbformat.read(f,4); n=0
    for c in nb.cells:
        if c.cell_type=="code":
            k=[o for o in c.outputs if o.get("name")!="stderr"]; n+=len(c.outputs)-len(k); c.outputs=k
    cells=[c for c in nb.cells if c.cell_type=="code"]
    counts=[c.execution_count for c in cells]==list(range(1,len(cells)+1))
    print(f,n,counts,sum(bool(c.outputs) for c in cells)/len(cells))
    if n: nbformat.write(nb,f)
