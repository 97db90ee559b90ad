import nbformat,sys
f=f"tutorials/{sys.argv[1]}.ipynb"; nb=nbformat.read(f,4)
for c in nb.cells:
    if c.cell_type!="code": continue
    out=[]
    for o in c.outputs:
        if out and o.output_type=="stream" and out[-1].output_type=="stream" and o.name==out[-1].name: out[-1].text+=o.text
        else: out.append(o)
    c.outputs=out
nbformat.write(nb,f)
